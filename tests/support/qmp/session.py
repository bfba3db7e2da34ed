"""One session with everything that a client of QEMU would do: session.py SOCKET"""

import asyncio
import sys

from listening import connected, heard
from qemu.qmp import ExecuteError


async def session(path):
    client, listener = await connected(path)

    assert await client.execute("query-status") == {"running": True, "status": "running"}
    assert await client.execute("stop") == {}
    await heard(listener, "STOP")
    assert await client.execute("query-status") == {"running": False, "status": "paused"}
    assert await client.execute("cont") == {}
    await heard(listener, "RESUME")

    try:
        await client.execute("device_add", {"driver": "nvme"})
        raise AssertionError("an unknown command was accepted")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error

    await client.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
    )
    await client.execute("migrate-set-parameters", {"downtime-limit": 50, "max-bandwidth": 1 << 30})
    parameters = await client.execute("query-migrate-parameters")
    assert parameters["downtime-limit"] == 50, parameters
    assert parameters["max-bandwidth"] == 1 << 30, parameters
    assert (parameters["multifd-channels"], parameters["multifd-compression"]) == (2, "none"), parameters

    assert await client.execute("query-migrate") == {}
    await client.execute("migrate", {"uri": "unix:/nowhere"})
    assert (await heard(listener, "MIGRATION"))["data"] == {"status": "setup"}
    await client.execute("migrate_cancel")
    assert (await heard(listener, "MIGRATION"))["data"] == {"status": "cancelled"}
    assert (await client.execute("query-migrate"))["status"] == "cancelled"

    assert (await client.execute("x-ferry-status"))["ownership"] == "owned"

    await client.execute("quit")
    assert (await heard(listener, "SHUTDOWN"))["data"] == {"guest": False, "reason": "host-qmp-quit"}
    await client.disconnect()


asyncio.run(session(sys.argv[1]))
