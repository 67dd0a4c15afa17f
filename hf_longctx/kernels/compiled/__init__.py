"""Operations of the compiled library (`csrc/`), called with ctypes."""
