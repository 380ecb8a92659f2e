"""How frames travel: the contract (`base`) and the registry of installed transports (`registry`)."""
