"""Looking inside: what was captured, found, rewritten and refused, as data, as text and as one HTML page."""
