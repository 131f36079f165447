"""The truth of every op in plain torch. Runs in any dtype, float64 too, on any device."""
