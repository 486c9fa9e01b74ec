"""Array-level operations on the QuaRTZ number format, with one implementation a backend."""
