"""The form of each file that the program writes, as dataclasses: qat/base/own_json.py reads by them."""
