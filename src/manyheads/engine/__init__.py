"""The few cores that every mechanism lowers to."""
