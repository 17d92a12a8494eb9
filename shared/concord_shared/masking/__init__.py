"""FSA-1: the exact sum of masked Updates. The coordinator learns the sum of those who survived, and nothing else.

    thresholds   how many nodes are needed: from the signed manifest, never from who showed up
    attempt      what all parties of one attempt are bound to, and sign
    shamir       shares of a secret
    stream       the mask stream

The node's side is `concord_client.masked_step`, the coordinator's `concord_server.unmasking`.
"""
