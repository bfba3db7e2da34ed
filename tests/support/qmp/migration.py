"""A guest is stopped, continued and moved, and its first process ended: migration.py SOURCE DESTINATION URI"""

import asyncio
import sys

from listening import connected, heard, next_event

EVENTS = {"capability": "events", "state": True}


async def until(listener, status):
    """The names of all events up to the end of a migration, its statuses by themselves."""
    names = []
    while not names or names[-1] != status:
        event = await next_event(listener)
        names.append(event["data"]["status"] if event["event"] == "MIGRATION" else event["event"])
    return names


async def migration(source_path, destination_path, uri):
    source, at_source = await connected(source_path)
    destination, at_destination = await connected(destination_path)

    assert await source.execute("query-status") == {"running": True, "status": "running"}
    assert await destination.execute("query-status") == {"running": False, "status": "inmigrate"}
    assert await source.execute("stop") == {}
    await heard(at_source, "STOP")
    assert await source.execute("query-status") == {"running": False, "status": "paused"}
    assert await source.execute("cont") == {}
    await heard(at_source, "RESUME")

    for client in (source, destination):
        await client.execute("migrate-set-capabilities", {"capabilities": [EVENTS]})
        assert EVENTS in await client.execute("query-migrate-capabilities")
    assert await source.execute("query-migrate") == {}
    await source.execute("migrate", {"uri": uri})
    names = await until(at_source, "completed")
    assert names == ["setup", "active", "STOP", "device", "completed"], names
    names = await until(at_destination, "completed")
    assert names == ["setup", "active", "device", "RESUME", "completed"], names

    info = await source.execute("query-migrate")
    assert info["status"] == "completed" and info["ram"]["transferred"] > 0 and info["total-time"] > 0, info
    assert await source.execute("query-status") == {"running": False, "status": "postmigrate"}
    assert await destination.execute("query-status") == {"running": True, "status": "running"}
    assert (await source.execute("x-ferry-status"))["ownership"] == "given-away"
    assert (await destination.execute("x-ferry-status"))["ownership"] == "owned"

    await destination.disconnect()
    await source.execute("quit")
    assert (await heard(at_source, "SHUTDOWN"))["data"] == {"guest": False, "reason": "host-qmp-quit"}
    await source.disconnect()


asyncio.run(migration(*sys.argv[1:]))
