"""What a study says: its file read, checked, and resolved into runs. Imports neither torch nor ray."""
