"""What happened, so that nobody can say otherwise later: logs that only grow, receipts, and the capsule of a run.

merkle     one hash for a whole log, and short proofs about it (RFC 6962)
log        entries, chained; a log as a file, and its verifier
heads      what the owner of a log signs, and what others remember of it
receipts   the coordinator's word for an Update that it took, and the node's for what it sent
capsule    one run in one file, for somebody who trusts neither side
"""
