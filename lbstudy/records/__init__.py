"""What a study leaves on disk, and who may write there. Imports neither torch nor ray."""
