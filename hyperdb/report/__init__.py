"""Tables and figures from results; imports no torch."""
