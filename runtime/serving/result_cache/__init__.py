"""The result cache: gives an answer that was computed before, in place of computing it again."""
