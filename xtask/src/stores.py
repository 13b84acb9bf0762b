"""Makes the bucket and the container whose URLs are given.

moto takes any request. Azurite wants one that is signed with the key that every Azurite has.
"""

import base64
import email.utils
import hashlib
import hmac
import sys
import urllib.parse
import urllib.request

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def put(url, headers):
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)) as answer:
        assert answer.status in (200, 201), answer.status


bucket, container = sys.argv[1:]
put(bucket, {})

url = container + "?restype=container"
path = urllib.parse.urlparse(url).path
account = path.split("/")[1]
headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
# The string to sign: method, eleven empty standard headers, then ours and the resource.
named = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
text = "PUT" + "\n" * 12 + f"{named}/{account}{path}\nrestype:container"
signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
headers["Authorization"] = f"SharedKey {account}:{signature}"
put(url, headers)
