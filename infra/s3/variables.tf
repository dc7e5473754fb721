variable "region" {
  description = "AWS region of the buckets."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: expected a name such as eu-central-1."
  }
}

variable "prefix" {
  description = "First part of every name: <prefix>-data, <prefix>-runs, <prefix>-dvc, <prefix>-mlflow. Bucket names are global."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{2,40}[a-z0-9]$", var.prefix))
    error_message = "prefix: 4 to 42 characters of a-z, 0-9 and -, neither starting nor ending with -."
  }
}

variable "kms_key_arn" {
  description = "KMS key of the buckets; null encrypts with keys that S3 manages."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:aws[a-z-]*:kms:", var.kms_key_arn))
    error_message = "kms_key_arn: expected the ARN of a KMS key."
  }
}

variable "abort_uploads_days" {
  description = "Days after which the parts of an upload that was never completed are deleted."
  type        = number
  default     = 7

  validation {
    condition     = var.abort_uploads_days >= 1 && var.abort_uploads_days <= 30 && floor(var.abort_uploads_days) == var.abort_uploads_days
    error_message = "abort_uploads_days: a whole number from 1 to 30."
  }
}

variable "old_versions_days" {
  description = "Days for which an overwritten or deleted object can be brought back."
  type        = number
  default     = 30

  validation {
    condition     = var.old_versions_days >= 1 && floor(var.old_versions_days) == var.old_versions_days
    error_message = "old_versions_days: a whole number, at least 1."
  }
}

variable "force_destroy" {
  description = "Whether `terraform destroy` may delete buckets that hold objects."
  type        = bool
  default     = false
}

variable "submitters" {
  description = "ARNs of the users or roles that may assume the submitter's role: laptops, CI."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.submitters : can(regex("^arn:aws[a-z-]*:(iam|sts)::[0-9]{12}:", arn))])
    error_message = "submitters: every entry is the ARN of an IAM user or role; a wildcard is no principal."
  }
}

variable "eks_cluster" {
  description = "Name of an EKS cluster whose service accounts get the roles by EKS Pod Identity; null for none."
  type        = string
  default     = null
}

variable "namespace" {
  description = "Namespace of the service accounts dgm-ray and dgm-mlflow."
  type        = string
  default     = "dgm"
}

variable "vpc_id" {
  description = "VPC of `ray up` clusters, which get the security group <prefix>-ray; null for none."
  type        = string
  default     = null
}

variable "ssh_cidrs" {
  description = "Networks from which the head takes SSH, which carries `ray up` and the tunnel to the dashboard."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.ssh_cidrs : can(cidrnetmask(cidr)) && cidr != "0.0.0.0/0"])
    error_message = "ssh_cidrs: IPv4 networks such as 203.0.113.7/32, and not the whole internet."
  }
}
