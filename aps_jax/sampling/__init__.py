"""What samplers are made of: rows, schedules, draws, remasking, starts, the inner loop."""
