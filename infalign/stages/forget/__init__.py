"""`infalign forget`: learn tasks, forget them by randomised fine-tuning, and measure what went."""
