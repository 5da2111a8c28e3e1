"""Load over time: arrivals, the driver, what was delivered, and the search for a rate."""
