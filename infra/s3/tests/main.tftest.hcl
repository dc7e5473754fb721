# `terraform test`: the whole configuration against the provider's schema, with answers made up; AWS is not asked.
mock_provider "aws" {
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
  }
}

variables {
  region = "eu-central-1"
  prefix = "dgm-test"
}

run "buckets_are_closed" {
  command = plan

  assert {
    condition     = toset([for bucket in aws_s3_bucket.this : bucket.bucket]) == toset(["dgm-test-data", "dgm-test-runs", "dgm-test-dvc", "dgm-test-mlflow"])
    error_message = "four buckets by the prefix"
  }

  assert {
    condition     = alltrue([for bucket in local.buckets : aws_s3_bucket_versioning.this[bucket].versioning_configuration[0].status == "Enabled"])
    error_message = "versioning"
  }

  assert {
    condition     = alltrue([for block in aws_s3_bucket_public_access_block.this : block.block_public_acls && block.block_public_policy && block.ignore_public_acls && block.restrict_public_buckets]) && length(aws_s3_bucket_public_access_block.this) == 4
    error_message = "public access"
  }

  assert {
    condition     = alltrue([for bucket in local.buckets : anytrue([for rule in aws_s3_bucket_lifecycle_configuration.this[bucket].rule : try(rule.abort_incomplete_multipart_upload[0].days_after_initiation == 7, false)])])
    error_message = "abandoned uploads"
  }

  assert {
    condition     = alltrue([for document in data.aws_iam_policy_document.tls_only : document.statement[0].effect == "Deny" && one(document.statement[0].condition).variable == "aws:SecureTransport"]) && length(aws_s3_bucket_policy.this) == 4
    error_message = "TLS alone"
  }

  assert {
    condition     = alltrue([for bucket in aws_s3_bucket.this : !bucket.force_destroy])
    error_message = "buckets with objects are not destroyed"
  }
}

run "roles_reach_their_own_buckets_alone" {
  command = plan

  assert {
    condition     = !contains(keys(local.grants.worker), "dvc") && !contains(keys(local.grants.worker), "mlflow") && local.grants.worker.data == local.read
    error_message = "a worker reads data and writes runs"
  }

  assert {
    condition     = keys(local.grants.mlflow) == ["mlflow"] && !contains(keys(local.grants.submitter), "mlflow")
    error_message = "the MLflow server's bucket is its own"
  }

  assert {
    condition     = length(aws_iam_role.submitter) == 0 && length(aws_eks_pod_identity_association.machine) == 0 && length(aws_security_group.ray) == 0
    error_message = "nothing that was not asked for"
  }
}

run "options_add_what_they_name" {
  command = plan

  variables {
    submitters  = ["arn:aws:iam::123456789012:user/somebody"]
    eks_cluster = "somewhere"
    vpc_id      = "vpc-0123456789abcdef0"
    ssh_cidrs   = ["203.0.113.7/32"]
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/a"
  }

  assert {
    condition     = length(aws_iam_role.submitter) == 1 && length(aws_eks_pod_identity_association.machine) == 2 && length(aws_vpc_security_group_ingress_rule.ssh) == 1
    error_message = "submitter, service accounts, security group"
  }

  assert {
    condition     = alltrue([for bucket in local.buckets : one(one(aws_s3_bucket_server_side_encryption_configuration.this[bucket].rule).apply_server_side_encryption_by_default).sse_algorithm == "aws:kms"])
    error_message = "the key"
  }
}

run "wrong_values_are_refused" {
  command = plan

  variables {
    region             = "Frankfurt"
    prefix             = "Not_A_Bucket"
    kms_key_arn        = "alias/key"
    abort_uploads_days = 0
    old_versions_days  = 0.5
    submitters         = ["*"]
    ssh_cidrs          = ["0.0.0.0/0"]
  }

  expect_failures = [
    var.region,
    var.prefix,
    var.kms_key_arn,
    var.abort_uploads_days,
    var.old_versions_days,
    var.submitters,
    var.ssh_cidrs,
  ]
}
