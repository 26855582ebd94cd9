"""Tests of compiler/families."""
