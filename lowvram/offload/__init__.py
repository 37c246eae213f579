"""Where bytes live: a budget, what needs room, a plan that fits, and what carries it out."""
