output "buckets" {
  description = "Bucket of each kind."
  value       = { for kind, bucket in aws_s3_bucket.this : kind => bucket.bucket }
}

output "storage" {
  description = "For params.yaml: cluster.storage."
  value       = "s3://${aws_s3_bucket.this["runs"].bucket}/store"
}

output "dvc_remote" {
  description = "For `dvc remote add -d s3 <this>`."
  value       = "s3://${aws_s3_bucket.this["dvc"].bucket}/dvc"
}

output "mlflow_artifacts" {
  description = "For the MLflow server: --artifacts-destination."
  value       = "s3://${aws_s3_bucket.this["mlflow"].bucket}/artifacts"
}

output "instance_profiles" {
  description = "For infra/ray/cluster.yaml: IamInstanceProfile of head and workers."
  value       = { for role, profile in aws_iam_instance_profile.machine : role => profile.arn }
}

output "submitter_role" {
  description = "Role that a laptop assumes; null without submitters."
  value       = one(aws_iam_role.submitter[*].arn)
}

output "ray_token_secret" {
  description = "Name of the secret that holds the Ray token."
  value       = aws_secretsmanager_secret.ray_token.name
}
