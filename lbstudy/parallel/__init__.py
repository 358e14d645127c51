"""One answer, whatever the number of workers: collective operations, batch norm, random streams."""
