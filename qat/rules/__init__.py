"""Decides where quantizers go, and describes and draws the decisions with their reasons."""
