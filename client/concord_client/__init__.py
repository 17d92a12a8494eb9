"""What a partner runs beside its data: reading, training, answering. Nothing of the coordinator is in here."""
