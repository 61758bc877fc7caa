"""How annotations are checked at run time in the tests: by beartype, with an int accepted where a float is wanted."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
