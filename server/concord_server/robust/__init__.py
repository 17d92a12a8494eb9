"""`privacy.mode = "robust"`: every Update in a row of a table, a rule over its columns, a report of who stands out.

table        step 10 of the walk: n × d integers in a memory-mapped file, rows by node name
rules        pure functions of columns: median, trimmed mean, nearest-neighbour mixing, clipping to the median norm
combining    the rule over the table, a piece of the columns at a time, and each row's figures
anomalies    who stands out in a round, by stated rules; who is left out of the rest of a run
"""
