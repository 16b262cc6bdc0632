"""What passes between a chat and an engine, in reading order: turn, sampling, template, dialect, profile, answer."""
