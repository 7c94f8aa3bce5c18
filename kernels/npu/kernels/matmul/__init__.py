"""C = A B with int8 operands and int32 sums, over all columns of the array."""
