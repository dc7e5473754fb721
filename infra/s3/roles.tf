# Who may do what. A worker never sees the DVC remote; nobody but the MLflow server sees its bucket (clients go through
# --serve-artifacts); no policy names a bucket that its role does not use.
locals {
  read  = ["s3:GetObject"]
  write = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]

  grants = {
    worker    = { data = local.read, runs = local.write }
    head      = { data = local.read, runs = local.write }
    mlflow    = { mlflow = local.write }
    submitter = { data = local.write, runs = local.write, dvc = local.write }
  }

  # roles that machines take, and the service account that takes the same role on Kubernetes
  machines = {
    worker = "dgm-ray"
    head   = null
    mlflow = "dgm-mlflow"
  }
}

locals {
  ec2 = "arn:${data.aws_partition.current.partition}:ec2:${var.region}:${data.aws_caller_identity.current.account_id}"
}

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_iam_policy_document" "machine_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }

  dynamic "statement" {
    for_each = var.eks_cluster == null ? [] : [var.eks_cluster]

    content {
      actions = ["sts:AssumeRole", "sts:TagSession"]

      principals {
        type        = "Service"
        identifiers = ["pods.eks.amazonaws.com"]
      }

      condition {
        test     = "StringEquals"
        variable = "aws:SourceAccount"
        values   = [data.aws_caller_identity.current.account_id]
      }
    }
  }
}

data "aws_iam_policy_document" "submitter_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "AWS"
      identifiers = var.submitters
    }
  }
}

data "aws_iam_policy_document" "storage" {
  for_each = local.grants

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [for bucket in keys(each.value) : aws_s3_bucket.this[bucket].arn]
  }

  dynamic "statement" {
    for_each = each.value

    content {
      sid       = "Objects${title(statement.key)}"
      actions   = statement.value
      resources = ["${aws_s3_bucket.this[statement.key].arn}/*"]
    }
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Key"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }

  dynamic "statement" {
    for_each = contains(["worker", "head", "submitter"], each.key) ? [1] : []

    content {
      sid       = "RayToken"
      actions   = ["secretsmanager:GetSecretValue"]
      resources = [aws_secretsmanager_secret.ray_token.arn]
    }
  }
}

resource "aws_iam_role" "machine" {
  for_each = local.machines

  name               = "${var.prefix}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.machine_trust.json
}

resource "aws_iam_role" "submitter" {
  count = length(var.submitters) > 0 ? 1 : 0

  name               = "${var.prefix}-submitter"
  assume_role_policy = data.aws_iam_policy_document.submitter_trust.json
}

resource "aws_iam_role_policy" "machine" {
  for_each = local.machines

  name   = "storage"
  role   = aws_iam_role.machine[each.key].id
  policy = data.aws_iam_policy_document.storage[each.key].json
}

resource "aws_iam_role_policy" "submitter" {
  count = length(var.submitters) > 0 ? 1 : 0

  name   = "storage"
  role   = aws_iam_role.submitter[0].id
  policy = data.aws_iam_policy_document.storage["submitter"].json
}

resource "aws_iam_instance_profile" "machine" {
  for_each = local.machines

  name = aws_iam_role.machine[each.key].name
  role = aws_iam_role.machine[each.key].name
}

# The head of a `ray up` cluster starts and ends workers: instances that carry the tag of its cluster, with the worker's role
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceStatus", "ec2:DescribeInstanceTypes", "ec2:DescribeImages", "ec2:DescribeKeyPairs", "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets", "ec2:DescribeVpcs"]
    resources = ["*"] # these actions know no narrower resource

    condition {
      test     = "StringEquals"
      variable = "aws:RequestedRegion"
      values   = [var.region]
    }
  }

  statement {
    sid       = "ImageOfTheDay"
    actions   = ["ssm:GetParameters"]
    resources = ["arn:${data.aws_partition.current.partition}:ssm:${var.region}::parameter/aws/service/*"]
  }

  statement {
    sid       = "Start"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.prefix]
    }
  }

  statement {
    sid     = "StartFrom"
    actions = ["ec2:RunInstances"]
    resources = concat(
      [for kind in ["key-pair", "network-interface", "security-group", "subnet", "volume", "spot-instances-request"] : "${local.ec2}:${kind}/*"],
      ["arn:${data.aws_partition.current.partition}:ec2:${var.region}::image/*"],
    )
  }

  statement {
    sid       = "TagWhatStarts"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.ec2}:*/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }

  statement {
    sid       = "End"
    actions   = ["ec2:TerminateInstances", "ec2:CreateTags"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.prefix]
    }
  }

  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.machine["worker"].arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }

  statement {
    sid       = "ReadProfile"
    actions   = ["iam:GetInstanceProfile"]
    resources = [aws_iam_instance_profile.machine["worker"].arn]
  }
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.machine["head"].id
  policy = data.aws_iam_policy_document.autoscaler.json
}

# The token itself is put by `aws secretsmanager put-secret-value`, so that it stands in no Terraform state
resource "aws_secretsmanager_secret" "ray_token" {
  name                    = "${var.prefix}/ray-token"
  description             = "Token of the Ray cluster (RAY_AUTH_MODE=token)."
  recovery_window_in_days = var.force_destroy ? 0 : 7
}

resource "aws_eks_pod_identity_association" "machine" {
  for_each = var.eks_cluster == null ? {} : { for role, account in local.machines : role => account if account != null }

  cluster_name    = var.eks_cluster
  namespace       = var.namespace
  service_account = each.value
  role_arn        = aws_iam_role.machine[each.key].arn
}
