"""From a study's records to tables: needs neither torch nor ray."""
