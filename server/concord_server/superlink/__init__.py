"""Flower's SuperLink, embedded: it stores and routes messages of rounds, and decides nothing.

    access.py      who may connect: the active nodes of the roster, read from the database every second
    firewall.py    which paths a node and the coordinator's own worker may reach; waiting without polling
    rooms.py       what the worker asks of the SuperLink beside Flower's own API: nodes, runs
    spool.py       large objects lie on the disk, so that memory does not grow with the number of nodes
    app.py         the process
    transport.py   the worker's side: the Transport of a run between machines

Private modules of Flower are imported here, in `concord_client.fleet` and in what both share
(`concord_shared.flower_objects`), and nowhere else that runs between machines; tests/integration/
test_flower_contract.py fails where a version of Flower lacks what is used.
"""
