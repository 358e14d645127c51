"""A study on Ray: search, lanes, records of what runs. Nothing but this room, and what spreads minima, imports ray."""
