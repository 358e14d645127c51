"""`python -m lbstudy.trackers FOLDER TRACKER`: the process that keeps a tracker up to date, see `follow`."""

import sys

from lbstudy.records.folder import StudyFolder
from lbstudy.storage import locate
from lbstudy.trackers.follow import follow

sys.exit(follow(StudyFolder(locate(sys.argv[1])), sys.argv[2]))  # type: ignore[arg-type]
