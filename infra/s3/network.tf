# The door of a `ray up` cluster. Without this group Ray makes one that lets the whole internet try port 22.
resource "aws_security_group" "ray" {
  count = var.vpc_id == null ? 0 : 1

  name        = "${var.prefix}-ray"
  description = "Nodes of the Ray cluster: everything among themselves, SSH from the given networks."
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "among_nodes" {
  count = var.vpc_id == null ? 0 : 1

  security_group_id            = aws_security_group.ray[0].id
  referenced_security_group_id = aws_security_group.ray[0].id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_ingress_rule" "ssh" {
  for_each = var.vpc_id == null ? toset([]) : toset(var.ssh_cidrs)

  security_group_id = aws_security_group.ray[0].id
  cidr_ipv4         = each.value
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
}

resource "aws_vpc_security_group_egress_rule" "all" {
  count = var.vpc_id == null ? 0 : 1

  security_group_id = aws_security_group.ray[0].id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}
