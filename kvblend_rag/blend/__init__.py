"""Pure functions of blending, in reading order: chunk, match, plan, rope, gate."""
