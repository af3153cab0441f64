"""What the kernel classes share: argument checks, the segment loop, decay sums, the split algebra."""
