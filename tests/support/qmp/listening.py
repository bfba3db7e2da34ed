"""What the scripts of this folder share: a client of QEMU's package, and the events that it hears."""

import asyncio

from qemu.qmp import EventListener, QMPClient


async def connected(path):
    """A client of the socket at `path`, and its listener."""
    client = QMPClient("test")
    listener = EventListener()
    client.register_listener(listener)
    await client.connect(path)
    return client, listener


async def next_event(listener):
    """The next event, whichever it is."""
    event = await asyncio.wait_for(listener.get(), timeout=120)
    assert set(event["timestamp"]) == {"seconds", "microseconds"}, event
    return event


async def heard(listener, name):
    """The next event, which must be of this name."""
    event = await next_event(listener)
    assert event["event"] == name, event
    return event
