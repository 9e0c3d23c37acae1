"""The steps of a run, one file each: strings dataset, wan and networks together. May import all of them and utils."""
