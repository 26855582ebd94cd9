"""Tests of compiler/frontends."""
