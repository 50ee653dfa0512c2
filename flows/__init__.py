"""The flows, one a file. A flow file holds only flows: Prefect loads it under another module name."""
