"""Records in; tables, figures and the report out. Needs no model.

``making`` says what is made of a folder of records, ``recipes`` what ``reproduce`` runs, ``integrity`` whether a folder
still matches its record, ``answers`` reads answer files of others. Read ``making`` first.
"""
