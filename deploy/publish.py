"""Uploads a trained model to the Hugging Face Hub; requires `hf auth login`.

python deploy/publish.py RUN/FOLDER LABEL OWNER/NAME
"""

import sys
import tempfile

from involution import hub
from involution.utils.errors import InputError

if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    run, label, repo = sys.argv[1:]
    try:
        with tempfile.TemporaryDirectory() as folder:
            hub.save(run, label, folder, name=repo.rsplit("/", 1)[-1])
            revision = hub.push(folder, repo)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f'involution.hub.load("{repo}", revision="{revision}")')
