"""The privacy ledger: what each dataset of this node may still tell, kept by its owner, and by nobody else.

    words      what an entry says: cap, reservation, charge, release, closing, gap
    filter     the arithmetic: Rényi differential privacy at one order, fixed with the cap
    books      the entries added up; every rule that a new entry must keep
    marks      where the ledger once stood, remembered outside of it
    ledger     the file: append-only, chained by hashes, durable before anything that depends on it
    costs      what a plan costs on so many rows
    admission  approval + manifest → reservation
    witness    what the coordinator remembers of it

Step 2 of the walk: the charge of a round is on the disk before its first batch is touched.
"""
