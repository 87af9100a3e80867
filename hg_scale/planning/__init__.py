"""What a run costs, whether it fits, and which layout is fastest; imports no torch."""
