"""A package onto the Hub.

contents.py  which files are sent: those that the manifests vouch for, intact and verified
card.py      README.md, the model card
push.py      the upload, one commit
"""
