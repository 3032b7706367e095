"""Measure what a method costs and saves: MACs, time, and the distance to the unaccelerated picture."""
