"""What is measured: one module a suite, and what several of them share."""
