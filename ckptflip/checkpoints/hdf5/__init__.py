"""HDF5: the walker, the places of words in a file, and how they are altered."""
