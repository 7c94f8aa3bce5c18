"""From a bundle and its floating-point reference to a report."""
