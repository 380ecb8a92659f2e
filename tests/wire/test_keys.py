"""Keys from the cluster's secret."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable

import pytest
import zmq
from zmq.utils import z85

from coordlib.errors import ConfigError, ForkedError
from coordlib.wire.keys import ClusterKeys, generate_secret, hkdf

PASSPHRASE = "correct horse battery staple"


def counting() -> Callable[[int], bytes]:
    """A source of bytes that repeats from run to run."""
    state = [0]

    def random_bytes(size: int) -> bytes:
        state[0] += 1
        return hkdf(state[0].to_bytes(8, "big"), salt=b"test", info=b"random", size=size)

    return random_bytes


SECRET = generate_secret(counting())


def test_a_generated_secret_holds_32_bytes_of_the_given_randomness() -> None:
    """And nothing else: it can be typed into an environment variable."""
    secret = generate_secret(lambda size: bytes(range(200, 200 + size)))
    assert secret.startswith("coord1-")
    assert base64.urlsafe_b64decode(secret[7:] + "=") == bytes(range(200, 232))
    assert secret.replace("-", "").replace("_", "").isalnum()


def test_derived_keys_are_what_they_were_in_the_first_release() -> None:
    """Wire: another value here parts running clusters from upgraded nodes."""
    secret = "coord1-" + base64.urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
    epoch = ClusterKeys.from_secrets([secret], "shop").epochs[0]
    assert (
        epoch.epoch_id.hex(),
        epoch.curve.server_public.hex(),
        epoch.curve.client_public.hex(),
        epoch.handshake_psk.hex(),
        epoch.handshake_mac.mac(b"x").hex(),
    ) == PINNED_GENERATED
    epoch = ClusterKeys.from_secrets([PASSPHRASE], "shop").epochs[0]
    assert (epoch.epoch_id.hex(), epoch.handshake_psk.hex()) == PINNED_PASSPHRASE


PINNED_GENERATED = (
    "b2a17413",
    "cf5ca02198e4aa1d710b24a9f4de429ebc0504a79c441da7a230825d9f5e5447",
    "aeb8f08d87df1c5e2d6f344ce589491b9d28c0c4042307f0f85f42cfc87ee13a",
    "c6856f81b7f99f4c7d202c34caff751d2044f11b2f839f8a7b22dc311d216f31",
    "4c5d95410bda8b95fc4fb2b277ca33728513cacb083e409f2e3f9390e4ba2931",
)
PINNED_PASSPHRASE = ("6f512523", "073756104f51a00609ad6bbfe3de3845ce013a17c99bb7489f7cd79ad1b02b56")


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Test case 1 of Appendix A."""
    okm = hkdf(bytes([0x0B] * 22), salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), size=42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


@pytest.mark.parametrize("secret", [SECRET, PASSPHRASE])
def test_the_same_secret_gives_the_same_keys_everywhere(secret: str) -> None:
    """Text or bytes, with or without the newline of the file it was read from."""
    expected = ClusterKeys.from_secrets([secret], "shop")
    for spelling in (secret, secret.encode(), secret + "\n"):
        keys = ClusterKeys.from_secrets([spelling], "shop")
        assert expected.epoch_ids == keys.epoch_ids
        assert expected.curve == keys.curve


@pytest.mark.parametrize("secret", [SECRET, PASSPHRASE])
def test_another_cluster_gets_other_keys_from_the_same_secret(secret: str) -> None:
    """One secret used twice does not join two clusters."""
    shop = ClusterKeys.from_secrets([secret], "shop").epochs[0]
    bank = ClusterKeys.from_secrets([secret], "bank").epochs[0]
    assert shop.epoch_id != bank.epoch_id
    assert not set(shop.curve) & set(bank.curve)
    assert shop.handshake_psk != bank.handshake_psk


def test_all_keys_of_an_epoch_differ() -> None:
    """Each purpose has its own."""
    epoch = ClusterKeys.from_secrets([SECRET], "shop").epochs[0]
    assert len({*epoch.curve, epoch.handshake_psk}) == 5


def test_public_keys_belong_to_their_private_keys_as_zeromq_computes_them() -> None:
    """The pairs are used by libzmq, so it is the judge."""
    curve = ClusterKeys.from_secrets([SECRET], "shop").curve[0]
    for public, private in (
        (curve.server_public, curve.server_secret),
        (curve.client_public, curve.client_secret),
    ):
        assert public == z85.decode(zmq.curve_public(z85.encode(private)))


def test_several_secrets_keep_their_order_and_are_found_by_epoch() -> None:
    """The first is used to begin, all are accepted."""
    other = generate_secret(bytes)
    keys = ClusterKeys.from_secrets([SECRET, other], "shop")
    assert keys.epoch_ids == (
        *ClusterKeys.from_secrets([SECRET], "shop").epoch_ids,
        *ClusterKeys.from_secrets([other], "shop").epoch_ids,
    )
    assert [keys.index_of(epoch_id) for epoch_id in keys.epoch_ids] == [0, 1]
    assert keys.index_of(b"none") is None
    assert len(keys.curve) == 2


def test_a_bare_string_is_one_secret() -> None:
    """And not a sequence of very short ones."""
    assert (
        ClusterKeys.from_secrets(PASSPHRASE, "shop").epoch_ids
        == ClusterKeys.from_secrets([PASSPHRASE], "shop").epoch_ids
    )


@pytest.mark.parametrize(
    ("secrets", "why"),
    [
        ([], "none"),
        ([PASSPHRASE] * 2, "the same twice"),
        ([f"{PASSPHRASE} {n}" for n in range(9)], "nine"),
        (["hunter2"], "too short"),
        ([""], "empty"),
        (["   \t            \n      "], "blank"),
        ([b"\xff\xfe" * 20], "not text"),
        ([SECRET[:-1]], "cut off"),
        ([SECRET + "AA"], "too long"),
        ([SECRET[:20] + "!" + SECRET[21:]], "damaged"),
        (["coord1-"], "empty generated secret"),
    ],
)
def test_unusable_secrets_are_refused_with_the_remedy_and_without_the_secret(
    secrets: list[str | bytes], why: str
) -> None:
    """The message is for a log: it names the setting and the remedy, never the value."""
    with pytest.raises(ConfigError, match="secret: ") as caught:
        ClusterKeys.from_secrets(secrets, "shop")
    assert "coordlib keys new" in str(caught.value) or why == "the same twice"
    for secret in secrets:
        if len(secret) > 8:
            text = secret if isinstance(secret, str) else repr(secret)
            assert text not in str(caught.value)
    assert (
        caught.value.__context__ is None or caught.value.__suppress_context__ or why in ("cut off", "damaged")
    )


def test_representations_show_no_private_key() -> None:
    """What ends in a log or a traceback is public."""
    keys = ClusterKeys.from_secrets([SECRET], "shop")
    shown = repr((keys, keys.epochs, keys.curve, keys.epochs[0].curve))
    epoch = keys.epochs[0]
    for private in (epoch.handshake_psk, epoch.curve.server_secret, epoch.curve.client_secret):
        assert private.hex() not in shown
        assert repr(private) not in shown
        assert repr(private)[2:-1] not in shown


def test_wiped_keys_are_gone_and_say_so() -> None:
    """In a forked child nothing can be sealed in the parent's name."""
    keys = ClusterKeys.from_secrets([SECRET], "shop")
    keys.wipe()
    keys.wipe()
    assert not any(keys.epochs[0].handshake_psk)
    with pytest.raises(ForkedError):
        _ = keys.curve
    with pytest.raises(ForkedError):
        keys.index_of(b"abcd")


def test_the_error_for_a_bad_secret_survives_pickling() -> None:
    """It may cross a process boundary."""
    with pytest.raises(ConfigError) as caught:
        ClusterKeys.from_secrets(["short"], "shop")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
