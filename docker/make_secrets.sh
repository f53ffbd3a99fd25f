#!/bin/sh
# Make the secrets that compose.yaml mounts, once, in docker/secrets. Others on this machine cannot enter the folder; the
# files in it are readable, because the containers' user has another number than yours.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "docker/secrets is there already; remove it to make new ones (the stored data then needs the old ones)" >&2
    exit 1
fi
if ! command -v openssl >/dev/null; then
    echo "openssl is needed for the certificate of SeaweedFS's gRPC ports; install it" >&2
    exit 1
fi
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
umask 022
part=secrets.part              # half-made ones would pass for made
rm -rf "$part"
mkdir -m 700 "$part"
password=$(random 32) database=$(random 32)
random 32 > "$part/ray_token"
printf '%s' "$database" > "$part/postgres_password"

# One key for each who uses S3, with the rights that its work needs. `admin` makes the buckets and stays beside the server.
# `Write` of SeaweedFS covers deleting.
identities=""
identity() {                   # NAME ACTIONS, as JSON
    access=$(random 10) secret=$(random 32)
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$access" "$secret" > "$part/aws_$1"
    identities="$identities${identities:+,
 }{\"name\": \"$1\", \"credentials\": [{\"accessKey\": \"$access\", \"secretKey\": \"$secret\"}],
  \"actions\": [$2]}"
}
identity admin '"Admin", "Read", "List", "Tagging", "Write"'
identity ingest '"Read:volumes", "List:volumes", "Write:volumes"'
identity trainer '"Read:volumes", "List:volumes", "Read:runs", "List:runs", "Write:runs"'
identity mlflow '"Read:mlflow", "List:mlflow", "Write:mlflow"'
printf '{"identities": [%s]}\n' "$identities" > "$part/s3.json"

cat > "$part/mlflow_auth.ini" <<END
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg2://mlflow@postgres/mlflow
admin_username = admin
admin_password = $password
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
# Without it whoever reaches the gRPC port of the S3 server may give himself a key: see cluster/grpc_certificate.py.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=tomoscale \
    -keyout "$part/key" -out "$part/certificate" 2>/dev/null
cat "$part/key" "$part/certificate" > "$part/grpc.pem"
rm "$part/key" "$part/certificate"
chmod 644 "$part/grpc.pem"     # openssl's key is the owner's alone, and the container's user is another
# Without a key for webhooks each of MLflow's processes makes one, and the others cannot read what it wrote.
webhooks=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')
printf 'MLFLOW_FLASK_SERVER_SECRET_KEY=%s\nMLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=%s\nPGPASSWORD=%s\n' \
    "$(random 32)" "$webhooks" "$database" > "$part/mlflow_server.env"
printf 'MLFLOW_TRACKING_USERNAME=admin\nMLFLOW_TRACKING_PASSWORD=%s\n' "$password" > "$part/mlflow_client.env"
mv "$part" secrets
echo "made docker/secrets"
