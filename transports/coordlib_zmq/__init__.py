"""Frames over ZeroMQ: CURVE with ZAP enforced, one DEALER for each connection, one ROUTER for all peers.

`transport` holds the loop; `listen` opens addresses, `zap` admits keys, `monitor` reads what libzmq
tells about connections, `wires` looks at the TCP connections themselves (what libzmq has no option
for). Nothing here decodes a frame.
"""

from coordlib_zmq.transport import ZmqTransport

__all__ = ["ZmqTransport"]
